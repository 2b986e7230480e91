"""SegNet on CamVid, trained with UN: the paper's application (section 5, figure 2).

`config` has every number, `data` the images, `synthetic` invented ones, `augment` their changes,
`model` the network, `training` the program that the loop of `unitnorm.run` trains, `evaluation` and
`metrics` what is measured, `experiment` the runs, `schema`, `weights` and `tables` what is kept and
said of them, `pictures` and `predicting` what can be looked at. Importing this package imports none
of them.
"""
