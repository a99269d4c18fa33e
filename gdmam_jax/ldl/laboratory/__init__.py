"""Experiments on label distributions: train methods on a data set's folds, compare them.

- `protocol`: what all methods have in common, the selections
- `methods`: what can be compared, and how to add a method of your own
- `baselines`: trivial predictions, which need no features
- `program`: a method on a data set, compiled
- `training`: the runs of all folds, in threads, with checkpoints
- `experiment`: every method with every learning rate and setting, into a folder
- `selection`: which epoch, learning rate and setting count
- `results`: what lies in a folder
- `tables`, `pictures`, `report`: of one data set
- `compare`: ranks over several data sets
- `storage`, `progress`: files that are whole or absent; progress bars
"""
