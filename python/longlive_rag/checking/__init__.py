"""Are the kernels right on this machine? Checked in processes of their own, and remembered."""
