package quic

// maxGSOSegments is the number of segments in one message that every kernel
// with UDP GSO accepts.
const maxGSOSegments = 64
