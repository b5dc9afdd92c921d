"""Episodes as rosbag2 recordings, and their playback."""
