"""``headwise bench``: what choosing heads costs, against the layers that physically have fewer.

Every benchmark checks what it times against the oracle (compute every head, weigh, project) first,
and lets its contenders take turns, so that a busy machine slows them alike.
"""
