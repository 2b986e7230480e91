"""SegNet on CamVid, trained with UN: the paper's application (section 5, figure 2).

Importing this package imports none of its modules.
"""
