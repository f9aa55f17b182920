"""Data flow from MDS shards to batches, by module.

    mixture   which streams fill a step's slots (token shares → pack rates)
    order     which pack of a stream comes next (every pack once a pass, in blocks of shards)
    shard_set a data set at its location: manifest, indexes and shards, all of them checked, and its cache
    streaming_compat every override of StreamingDataset's internals
    loader    packs of the steps of this rank and worker, fetched ahead
    steps     the loader with a step as its state, for training here and in other programs
    workers   loader processes: their start and end
    batch     packs → one row [1, T] with cu_seqlens, without padding

The order is a pure function of configuration and step number. It has no state, so a run resumes by starting at
another step, and the numbers of ranks and workers cannot change the packs of a step.
"""
