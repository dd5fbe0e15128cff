"""Published sizes at 224 pixels and 1000 classes, as printed: (parameters, of them frozen, MACs) by config.

PoolFormer: Yu et al. 2022, arXiv:2111.11418. The baselines: arXiv:2210.13452, and the list of the released code
(sail-sg/metaformer). Both count MACs with fvcore; docs/vision.md says what that counts.
"""

PUBLISHED = {
    "configs/metaformer/poolformer.py:s12": ("12M", None, "1.8G"),
    "configs/metaformer/poolformer.py:s24": ("21M", None, "3.4G"),
    "configs/metaformer/poolformer.py:s36": ("31M", None, "5.0G"),
    "configs/metaformer/poolformer.py:m36": ("56M", None, "8.8G"),
    "configs/metaformer/poolformer.py:m48": ("73M", None, "11.6G"),
    "configs/metaformer/baselines.py:identityformer_s12": ("11.9M", None, "1.8G"),
    "configs/metaformer/baselines.py:identityformer_s24": ("21.3M", None, "3.4G"),
    "configs/metaformer/baselines.py:identityformer_s36": ("30.8M", None, "5.0G"),
    "configs/metaformer/baselines.py:identityformer_m36": ("56.1M", None, "8.8G"),
    "configs/metaformer/baselines.py:identityformer_m48": ("73.3M", None, "11.5G"),
    "configs/metaformer/baselines.py:randformer_s12": ("11.9M", "0.2M", "1.9G"),
    "configs/metaformer/baselines.py:randformer_s24": ("21.3M", "0.5M", "3.5G"),
    "configs/metaformer/baselines.py:randformer_s36": ("30.8M", "0.7M", "5.2G"),
    "configs/metaformer/baselines.py:randformer_m36": ("56.1M", "0.7M", "9.0G"),
    "configs/metaformer/baselines.py:randformer_m48": ("73.3M", "0.9M", "11.9G"),
    "configs/metaformer/baselines.py:poolformerv2_s12": ("11.9M", None, "1.8G"),
    "configs/metaformer/baselines.py:poolformerv2_s24": ("21.3M", None, "3.4G"),
    "configs/metaformer/baselines.py:poolformerv2_s36": ("30.8M", None, "5.0G"),
    "configs/metaformer/baselines.py:poolformerv2_m36": ("56.1M", None, "8.8G"),
    "configs/metaformer/baselines.py:poolformerv2_m48": ("73.3M", None, "11.5G"),
    "configs/metaformer/baselines.py:convformer_s18": ("27M", None, "3.9G"),
    "configs/metaformer/baselines.py:convformer_s36": ("40M", None, "7.6G"),
    "configs/metaformer/baselines.py:convformer_m36": ("57M", None, "12.8G"),
    "configs/metaformer/baselines.py:convformer_b36": ("100M", None, "22.6G"),
    "configs/metaformer/baselines.py:caformer_s18": ("26M", None, "4.1G"),
    "configs/metaformer/baselines.py:caformer_s36": ("39M", None, "8.0G"),
    "configs/metaformer/baselines.py:caformer_m36": ("56M", None, "13.2G"),
    "configs/metaformer/baselines.py:caformer_b36": ("99M", None, "23.2G"),
}
