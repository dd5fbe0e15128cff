"""MetaFormer in stages: PoolFormer and the MetaFormer baselines at ImageNet-1K sizes."""
