"""``align plan``: how much memory and time a recipe needs, by arithmetic on the shapes of its models.

`shapes` and `published` know the models, `gpu` and `host` the bytes of a role, `slots` adds roles that share a slot,
`remedies` tries keys, `steps` estimates seconds, `report` prints. No weight is read.
"""
