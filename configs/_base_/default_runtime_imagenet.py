_base_ = './default_runtime_cls.py'
log_processor = dict(by_epoch=True)
# Seed 0 and the number of the process, as published: each process mixes its batches and
# drops paths by its own numbers.
randomness = dict(seed=0, diff_rank_seed=True)
