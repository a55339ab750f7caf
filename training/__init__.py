"""Programs that train and evaluate, run from a checkout: `python -m training.pretrain --config RECIPE`."""
