"""What a segment is and how it is coded: HIGGS, AQUA-KV, calibration, wire format."""
