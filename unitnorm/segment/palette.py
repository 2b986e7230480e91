"""The eleven classes of CamVid in the order of their labels, and their colours."""

import functools

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CLASSES = len(NAMES)
UNLABELLED = CLASSES  # this label means: nobody said what it is
UNKNOWN = 255  # this one: a colour of no class

# Red, green and blue of each label, as the SegNet authors draw them; the last: unlabelled pixels.
COLOURS = np.array([
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
], np.uint8)  # fmt: skip

# CamVid's own 32 classes and colours, by the class that they are merged into. Colours:
# label_colors.txt of CamVid (Brostow, Fauqueur and Cipolla 2009, "Semantic object classes in
# video"). Merge: camvidPixelLabelIDs of MathWorks' example "Semantic segmentation using deep
# learning", which follows SegNet's; it leaves Void out alone.
CAMVID = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {"Building": (128, 0, 0), "Wall": (64, 192, 0), "Bridge": (0, 128, 64),
                 "Tunnel": (64, 0, 64), "Archway": (192, 0, 128)},
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {"Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192),
             "LaneMkgsNonDriv": (192, 0, 64)},
    "pavement": {"Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128),
                 "RoadShoulder": (128, 128, 192)},
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign": {"SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64),
             "TrafficLight": (0, 64, 64)},
    "fence": {"Fence": (64, 64, 128)},
    "car": {"Car": (64, 0, 128), "SUVPickupTruck": (64, 128, 192), "Truck_Bus": (192, 128, 192),
            "Train": (192, 64, 128), "OtherMoving": (128, 64, 64)},
    "pedestrian": {"Pedestrian": (64, 64, 0), "Child": (192, 128, 64),
                   "CartLuggagePram": (64, 0, 192), "Animal": (64, 128, 64)},
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
    "unlabelled": {"Void": (0, 0, 0)},
}  # fmt: skip


@functools.cache
def labels_by_colour() -> NDArray[np.uint8]:
    """Of each red, green and blue, the label in `CAMVID` or `COLOURS`, or `UNKNOWN`."""
    table = np.full((256, 256, 256), UNKNOWN, np.uint8)
    for label, merged in enumerate(CAMVID.values()):
        for colour in (*merged.values(), COLOURS[label]):
            table[tuple(colour)] = label
    return table
