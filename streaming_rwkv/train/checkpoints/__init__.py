"""Checkpoints on disk and in object storage.

`record`: name and completion mark. `local`: save and load on disk. `remote`: checkpoints in object storage.
`selection`: which one is the newest and which are removed, for both. `restore`: the checkpoint to resume from or to
read weights from. `branch`: a new run from another one's checkpoint. `uploader`: uploads during a run.
"""
