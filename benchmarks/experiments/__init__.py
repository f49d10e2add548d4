"""The paper's experiments on a small machine: a base of CIFAR-10 images that trains in a minute on one core."""
