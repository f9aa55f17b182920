"""Using trained weights: generate text, evaluate on a data set, export to other formats."""
