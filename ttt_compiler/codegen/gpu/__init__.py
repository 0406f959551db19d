"""The fast-weight ops on GPUs: launches of our kernels, and torch without a host synchronisation.

Compiled graphs use the lowerings instead where there are any; these serve what runs op by op. May be changed
here: how an op is put together. Importing the modules here needs triton where they launch kernels.
"""
