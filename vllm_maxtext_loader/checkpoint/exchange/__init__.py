"""Several hosts of one engine read each region of a checkpoint once, and send each other what their devices hold of it.

`sharing` says who reads what, `rendezvous` finds the other hosts, `peers` and `connection` move the bytes, and `exchange` is what
the reader sees of all this. Nothing here knows JAX: hosts are numbers (of their processes), and what each needs is given.
"""
