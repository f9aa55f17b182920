"""Raw corpora as documents: files and objects, their formats, and the units of work that divide them."""
