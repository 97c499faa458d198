"""Embeddings in shards, made by several devices, published one by one and checked at the end.

`files` plans, writes, checks and reads them; `pool` makes them in processes of this host, `cluster` on a Ray cluster;
`again` embeds some samples a second time elsewhere. A shard is a folder; the next run makes those a killed run missed.
"""
