"SHIM of the old layout; the owner of this room replaces it."
from di2l.eval import attention_maps, draw_attention, pair_distances, draw_distances, hardest_queries, draw_projection
