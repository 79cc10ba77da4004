from ..old_synthetic import *
