"""clipval: the acceptance suite for OpenCLIP models on inference accelerators.

Data flows one way, and a module imports only from its left:

errors -> towers -> store, environment, supervise, arrays -> ascend -> backends, datasets -> library -> transform
-> options -> spec -> result_files -> embeddings -> weights -> subject, pickled -> checkpoint -> model
-> preprocess, probe -> export -> parity, ranks, doctor
-> retrieval, architectures, shards -> reference -> chain -> throughput -> results -> gates, diagnose -> report -> run
-> promise, entry -> rescue -> plugin -> train_shapes, commands -> cli -> __main__

A module of a package counts as the package. `tests/unit/test_layering.py` holds the imports to this.
"""
