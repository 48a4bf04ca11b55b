module github.com/quic-go/quic-go
