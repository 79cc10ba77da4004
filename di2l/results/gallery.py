"SHIM of the old layout; the owner of this room replaces it."
from di2l.experiments import write_gallery, read_gallery, gallery_on_record, part_attention, chosen_queries
