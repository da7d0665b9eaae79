"""Load models, tokenizers and configs that may be missing, damaged or hostile.

From the model down:

    pretrained.py    a Mixture-of-Experts language model, its tokenizer, its empty copy
    adapter_base.py  the base that an adapter names, where a model was expected
    config_files.py  configs, checked before they can cost memory or time
    auto_classes.py  the auto class that loads a checkpoint whole
    errors.py        words for the Hub's answers; exceptions of other libraries for files that do not fit
"""
