"""Inputs: raw corpora to documents.

Data flow: discovery finds files; units divides them into units of work; readers turns units into documents, through
json_lines, parquet and token_ids by format, compression below them, and hooks, the user's functions, above them;
decontamination reads the evaluation texts that documents must not contain.
"""
