"""The workstation side: from a checkpoint to a bundle; `groot_int8_ros` never imports it."""
