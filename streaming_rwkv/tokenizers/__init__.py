"""The kinds of tokenizers behind one interface; `streaming_rwkv.tokenizer` loads them."""
