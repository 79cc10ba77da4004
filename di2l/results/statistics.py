"SHIM of the old layout; the owner of this room replaces it."
from di2l.experiments import results_frame, interval, differences as paired_differences, paired, ALL_SEARCH
