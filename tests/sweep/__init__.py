"""Every architecture of open_clip with seeded weights: does it export, and does ONNX Runtime agree with PyTorch?"""
