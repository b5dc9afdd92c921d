"""`groot-int8 measure-dds`: which transport of Fast DDS keeps camera frames whole."""
