"SHIM of the old layout; the owner of this room replaces it."
from di2l.train import Log, read_log, plot_log, Curves
