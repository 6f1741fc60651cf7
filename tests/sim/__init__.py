"""A whole network in one process and in virtual time, its faults and its order of events drawn from one seed."""
