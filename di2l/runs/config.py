"SHIM of the old layout; the owner of this room replaces it."
from di2l.train import Config, PRESETS, SOURCES, config, show_config, differences as config_changes
