"""Features of images by a trained encoder: files of them, and pages of nearest neighbours."""
