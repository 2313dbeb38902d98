"""How fast the operations are, beside their peers and the limit of the machine, all measured in one run."""
