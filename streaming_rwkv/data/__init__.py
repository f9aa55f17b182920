"""MDS shards to batches, in the order of the files:

    mixture   which streams fill a step's slots (token shares → pack rates)
    order     which pack of a stream comes next (every pack once a pass, in blocks of shards)
    shard_set a data set at its location: manifest, indexes and shards, all of them checked, and its cache
    loader    packs of the steps of this rank and worker, fetched ahead
    batch     packs → one row [1, T] with cu_seqlens, without padding

The order is a pure function of configuration and step number. Nothing in it is state, so resuming is starting at
another step, and neither the number of ranks nor of workers can change what a step sees.
"""
