"""How fast the operations are, beside their peers and the machine's limit, all measured in one run.

Each module here is one benchmark: `cases(machine)` names its cases, each a function that measures and returns a `Row`.
"""
