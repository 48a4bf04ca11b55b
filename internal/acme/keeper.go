package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// renewalWindow is the part of a certificate's life that is left when it is
// renewed, unless the server says when (RFC 9773): a third, which is what the
// servers recommend.
const renewalWindow = 3

// errUnusable is the error of what is in the folder and is no certificate with
// its key, as when the machine died between the two.
var errUnusable = errors.New("the stored certificate cannot be used")

// keeper is certmagic for one certificate: what is stored of it, and the
// conversation with the server. Nothing but Run decides when, so neither
// certmagic's cache nor its schedule has a part in it.
type keeper struct {
	cfg     Config
	cache   *certmagic.Cache // empty, but certmagic needs one
	magic   *certmagic.Config
	issuer  *certmagic.ACMEIssuer
	renewal acme.RenewalInfo // what the server says of the certificate with the number that follows
	serial  string
	asked   time.Time
}

func newKeeper(cfg Config) *keeper {
	k := &keeper{cfg: cfg}
	logger := zap.New(logCore{LevelEnabler: zap.LevelEnablerFunc(func(zapcore.Level) bool {
		return cfg.Logger.Enabled(context.Background(), slog.LevelDebug)
	}), logger: cfg.Logger})
	k.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) {
			return k.magic, nil
		},
		Logger: logger,
	})
	k.magic = certmagic.New(k.cache, certmagic.Config{
		Storage: newStorage(cfg.Storage),
		OCSP:    certmagic.OCSPConfig{DisableStapling: true},
		Logger:  logger,
	})
	host, port, _ := net.SplitHostPort(cfg.Listen) // the configuration was checked
	number, _ := strconv.Atoi(port)
	k.issuer = certmagic.NewACMEIssuer(k.magic, certmagic.ACMEIssuer{
		CA: cfg.Directory, Email: cfg.Email, Agreed: true, TrustedRoots: cfg.Roots,
		DisableHTTPChallenge:    cfg.Challenge != HTTP,
		DisableTLSALPNChallenge: cfg.Challenge != TLSALPN,
		ListenHost:              host, AltHTTPPort: number, AltTLSALPNPort: number,
		Logger: logger,
	})
	k.magic.Issuers = []certmagic.Issuer{k.issuer}
	return k
}

func (k *keeper) close() { k.cache.Stop() }

// load reads the stored certificate. The error wraps fs.ErrNotExist if there is
// none, and errUnusable if it is none.
func (k *keeper) load(ctx context.Context) (*tls.Certificate, error) {
	chain, err := k.magic.Storage.Load(ctx,
		certmagic.StorageKeys.SiteCert(k.issuer.IssuerKey(), k.cfg.Name))
	if err != nil {
		return nil, err
	}
	key, err := k.magic.Storage.Load(ctx,
		certmagic.StorageKeys.SitePrivateKey(k.issuer.IssuerKey(), k.cfg.Name))
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnusable, err)
	}
	return &cert, nil
}

// get has the server issue a certificate, and stores it with a new key: one
// that follows the stored one, or takes the place of what cannot be used.
func (k *keeper) get(ctx context.Context, renew bool) error {
	// A port that is taken would show as a challenge that fails, with a reason
	// that says nothing of it.
	if err := CheckListen(ctx, k.cfg); err != nil {
		return err
	}
	if renew {
		return k.magic.RenewCertSync(ctx, k.cfg.Name, true)
	}
	// With all its files there, certmagic would take the certificate for
	// obtained.
	if err := k.magic.Storage.Delete(ctx,
		certmagic.StorageKeys.SiteCert(k.issuer.IssuerKey(), k.cfg.Name)); err != nil {
		return err
	}
	return k.magic.ObtainCertSync(ctx, k.cfg.Name)
}

// due is when a certificate should be renewed. The server is asked, if it knows
// about that, as often as it wants to be.
func (k *keeper) due(ctx context.Context, leaf *x509.Certificate) time.Time {
	due := leaf.NotAfter.Add(-leaf.NotAfter.Sub(leaf.NotBefore) / renewalWindow)
	if serial := leaf.SerialNumber.String(); serial != k.serial || k.renewal.NeedsRefresh() ||
		!k.renewal.HasWindow() && time.Since(k.asked) >= lookInterval {
		info, err := k.issuer.GetRenewalInfo(ctx,
			certmagic.Certificate{Certificate: tls.Certificate{Leaf: leaf}})
		if err != nil {
			k.cfg.Logger.Debug("the server does not say when to renew", "error", err)
		}
		if err == nil || serial != k.serial {
			k.renewal = info
		}
		k.serial, k.asked = serial, time.Now()
	}
	if at := k.renewal.SelectedTime; !at.IsZero() && at.Before(leaf.NotAfter) {
		due = at
	}
	return due
}

// httpClient is what a server is asked with outside of certmagic.
func httpClient(cfg Config) *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: cfg.Roots}
	transport.DisableKeepAlives = true
	return &http.Client{Transport: transport, Timeout: certmagic.HTTPTimeout}
}
