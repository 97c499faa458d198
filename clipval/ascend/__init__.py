"""An Ascend NPU host: npu-smi, atc, the ACL runtimes and their messages, and a check of the host."""
