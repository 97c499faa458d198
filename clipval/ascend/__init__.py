"""What belongs to an Ascend NPU host: npu-smi, atc, the ACL runtime's words, and a check of the whole host."""
