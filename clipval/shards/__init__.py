"""Embeddings in shards, which are made by several devices, published one by one and checked at the end.

`files` cuts, writes, checks and reads them; `pool` makes them in processes of this host, `cluster` on a Ray cluster;
`again` embeds some samples once more elsewhere. A shard is a folder; what was killed is made again by the next run.
"""
