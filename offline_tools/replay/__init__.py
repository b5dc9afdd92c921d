"""`groot-int8 chunk-replay`: recorded motions executed through the robot's own executor."""
