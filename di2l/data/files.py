"SHIM of the old layout; the owner of this room replaces it."
from di2l.datasets import *
