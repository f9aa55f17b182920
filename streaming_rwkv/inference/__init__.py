"""Inference with trained weights: text generation, evaluation on a data set, export to other formats."""
