"""``headwise bench``: the cost of choosing heads, relative to layers that physically have fewer.

Every benchmark first checks its contenders against the oracle (compute every head, weight,
project), and alternates between them, so that a busy machine slows them alike.
"""
