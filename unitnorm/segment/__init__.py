"""SegNet on CamVid, trained with UN: the paper's application (section 5, figure 2).

`config.py` has every number, `data.py` the images, `synthetic.py` invented ones, `model.py` the
network, `training.py` the compiled steps and the loop around them, `metrics.py` what is measured,
`records.py` the files of a results folder, `figures.py` and `predicting.py` what can be looked at,
`cli.py` the commands. Importing this package imports none of them: `unitnorm --help` stays quick.
"""
