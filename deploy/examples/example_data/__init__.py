"""Real pictures for the examples: how they are read, and how they are divided over sites.

    idx       the IDX file format, bounded
    pictures  Fashion-MNIST from a folder, digits from scikit-learn
    split     which picture belongs to whom: a pure function of labels, seed, sites and alpha

Nothing here knows about Farflung. A data center of your own replaces this package by a reader of
its own data; only the tasks in ``images.py`` talk to the framework.
"""
