"""The commands beside `build`: inspect, convert, report, train-tokenizer."""
