package certs

import (
	"crypto/x509"
	"log/slog"
	"time"
)

// ExpiresSoon reports whether a certificate has expired or is in the last 30
// days or the last quarter of its validity, whichever is shorter. Programs that
// renew certificates do so earlier.
func ExpiresSoon(leaf *x509.Certificate, now time.Time) bool {
	return leaf.NotAfter.Sub(now) < min(30*24*time.Hour, leaf.NotAfter.Sub(leaf.NotBefore)/4)
}

// expiryInterval is the time between two warnings about one certificate.
const expiryInterval = 24 * time.Hour

// ExpiryWarning logs once a day that a certificate expires soon.
type ExpiryWarning struct {
	Name    string // such as tls.cert
	Renewal string // instruction for the operator
	Logger  *slog.Logger

	warned time.Time // last warning; zero: none
}

// Check logs the warning if leaf expires soon and a day has passed.
func (w *ExpiryWarning) Check(leaf *x509.Certificate, now time.Time) {
	if !ExpiresSoon(leaf, now) {
		w.warned = time.Time{}
		return
	}
	if !w.warned.IsZero() && now.Sub(w.warned) < expiryInterval {
		return
	}
	w.warned = now
	text := "the certificate ends soon"
	if now.After(leaf.NotAfter) {
		text = "the certificate has ended"
	}
	w.Logger.Warn(text, "certificate", w.Name, "certificate_until", leaf.NotAfter, "remedy",
		w.Renewal)
}
