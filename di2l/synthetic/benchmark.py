"SHIM of the old layout; the owner of this room replaces it."
from di2l.old_synthetic import *
from di2l.old_synthetic import fingerprint as read_benchmark
