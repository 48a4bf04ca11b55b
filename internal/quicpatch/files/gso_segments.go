package quic

// maxGSOSegments is how many segments every kernel with UDP GSO takes in one
// message.
const maxGSOSegments = 64
